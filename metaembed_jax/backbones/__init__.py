"""Families of backbones (`family`), the layers that they share (`layers`, `attention`), and adapters (`lora`)."""
