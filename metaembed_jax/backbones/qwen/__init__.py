"""Shared by the Qwen-VL families: prompts, images in units of patches, M-RoPE positions, exports."""
