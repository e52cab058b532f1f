"""What a training run looks like to a person: curves, predictions beside ground truth, all on one page."""
