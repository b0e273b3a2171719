"""Predictions as files of annotation tools, for people to correct; one file per format."""
