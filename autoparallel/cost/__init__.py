"""Seconds and bytes of operators and collectives on given hardware."""
