"""Graph surgery: adapters in torch.fx graphs and exported programs."""
