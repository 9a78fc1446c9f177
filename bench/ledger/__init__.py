"""What a training step asks of a device, counted at full size without one."""
