"""Layers of the decoder: they know tensors, and nothing of devices' meshes, losses' weights or logging."""
