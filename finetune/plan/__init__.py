"""From layer groups and settings to stages, rates and momentum at any step."""
