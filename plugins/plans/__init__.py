"""Plans outside the kernel: pictures, files, and PyTorch's BlockMask."""
