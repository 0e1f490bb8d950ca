"""The stages: one module each, with its settings class and ``run(config, task) -> Outcome``."""
