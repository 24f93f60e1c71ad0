"""Judges answers: before against after training, or best against worst as pairs for another round."""
