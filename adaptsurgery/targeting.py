"""Which modules a config means: PEFT's matching rules, once, for live models, graphs, checkpoints."""
