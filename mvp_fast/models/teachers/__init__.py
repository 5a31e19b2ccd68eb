"""The frozen makers of targets: CLIP, any ViT of timm, raw pixels, HOG. `build` chooses; `base` says what one is."""
