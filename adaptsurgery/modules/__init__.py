"""Live nn.Module surgery: adapters in a model that runs and trains, with PEFT's calls and configs."""
