"""Encoding of any items: sizes first, then packed rows in few programs, decoded ahead of the devices."""
