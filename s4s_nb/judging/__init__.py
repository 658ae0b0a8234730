"How far apart two images, or two sets of images, are."
