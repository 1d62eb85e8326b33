"""Encoding of items: packed rows in few programs, decoded ahead of the devices."""
