"Published networks as denoisers: architectures, readers, conditions, decoders and the cards that name them."
