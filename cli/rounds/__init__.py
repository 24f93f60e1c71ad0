"""dpoeng judge and round: answers that are judged, and trained on."""
