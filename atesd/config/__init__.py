"""The settings of a run: fields with their sources, what they may not say, and how files and flags become them."""

from atesd.config.load import CONFIG_FILE, ATESDConfig, config_parser, load_config, parse, recipes

__all__ = ["CONFIG_FILE", "ATESDConfig", "config_parser", "load_config", "parse", "recipes"]
