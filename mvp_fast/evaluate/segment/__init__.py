"""Semantic segmentation: UPerNet on a pre-trained backbone, from folders of images and masks to mIoU."""
