"""From words to the embedding matrix that classifies regions."""
