"""Answers that are judged: before against after training, and the best against the worst as pairs of another round."""
