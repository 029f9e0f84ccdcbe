"""Configs: each opens with what it shows, what it costs and its command."""
