"""Measuring kernels and transformer layers. Needs torch, triton and safetensors; `layers` needs diffusers too."""
