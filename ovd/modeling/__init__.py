"""The detector network: ViT backbone, proposals, text classifier, image-text scores and their fusion."""
