"""What every family of backbones makes its inputs with: images, texts, and their rows of a batch."""
