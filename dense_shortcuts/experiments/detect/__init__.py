"""Object detection with torchvision's detectors over the feature maps of any timm network, on data in COCO format."""
