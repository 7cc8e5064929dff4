"""What can be said of any nn.Module: its layers, blocks, masks and buffers; and bmctl's own networks."""
