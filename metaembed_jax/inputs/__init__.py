"""Images and texts as inputs, for all families of backbones."""
