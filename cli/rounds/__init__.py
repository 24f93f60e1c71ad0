"""dpoeng judge and dpoeng round: judge a policy's answers, and train on them."""
