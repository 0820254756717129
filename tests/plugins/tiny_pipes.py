"""A tiny pipeline for every host of the composition matrix, by the matrix's names: two steps in some ten milliseconds.

``PIPES[name]`` is (make, call): ``make()`` builds the pipeline, ``call(pipe, steps=2, **options)`` runs it to latents.
"""

import pipes_images as images
import pipes_video as video


def hunyuan15():
    from test_hunyuan15_pipeline import pipe_of

    return pipe_of()


def hunyuan15_call(pipe, steps=2, **options):
    from test_hunyuan15_pipeline import call

    return call(pipe, num_inference_steps=steps, **options)


PIPES = {
    "flux": (images.flux, images.flux_call),
    "flux-kontext": (images.kontext, images.kontext_call),
    "flux2": (images.flux2, images.flux2_call),
    "sd3": (images.sd3, images.sd3_call),
    "qwen-image": (images.qwen, images.qwen_call),
    "zimage": (images.zimage, images.zimage_call),
    "pixart": (images.pixart, images.pixart_call),
    "sd15": (images.sd15, images.sd15_call),
    "sdxl": (images.sdxl, images.sdxl_call),
    "animatediff": (images.animatediff, images.animatediff_call),
    "wan": (video.wan, video.wan_call),
    "wan2.2": (video.wan22, video.wan_call),
    "wan-i2v": (video.wan_i2v, video.wan_i2v_call),
    "wan-vace": (video.wan_vace, video.wan_vace_call),
    "skyreels": (video.skyreels, video.skyreels_call),
    "hunyuan": (video.hunyuan, video.hunyuan_call),
    "hunyuan1.5": (hunyuan15, hunyuan15_call),
    "cogvideox": (video.cogvideox, video.cogvideox_call),
    "ltx": (video.ltx, video.ltx_call),
    "ltx2": (video.ltx2, video.ltx2_call),
    "mochi": (video.mochi, video.mochi_call),
    "cosmos": (video.cosmos, video.cosmos_call),
}

# Settings that leave something out on every tiny grid.
METHODS = {
    "dense": {},
    "grat": {"group": (1, 2, 2), "b": (1, 1, 0)},
    "neighborhood": {"window": (1, 3, 3)},
}
