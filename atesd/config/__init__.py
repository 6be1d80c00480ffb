"""The settings of a run: the fields and their sources, their checks, and how files and flags are parsed."""

from atesd.config.load import CONFIG_FILE, ATESDConfig, config_parser, load_config, parse, recipes

__all__ = ["CONFIG_FILE", "ATESDConfig", "config_parser", "load_config", "parse", "recipes"]
