"""What the families of Qwen-VL share: prompts, images in units of patches, M-RoPE positions, exports."""
