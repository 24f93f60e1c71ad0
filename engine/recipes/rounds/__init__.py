"""Judged answers: before and after training, and the best and the worst as pairs for another round."""
