"""Scores of images: each module has one metric, or the features and references that several share."""
