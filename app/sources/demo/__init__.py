"""The built-in models and data sets by name, each in one line. Knows nothing else of them."""

DEMO_MODELS: dict[str, str] = {
    "digits": "Residual network with BatchNorm that has seen the handwritten digits 0–4 only",
    "digits-shifted": "The same network, which has seen all ten digits, none inverted or noisy",
    "three-layers": "Three linear layers, 10–20–30–2: freeze the second, the first still learns",
    "simple-model": "Two linear layers, 10–5–2, with a ReLU between them",
    "multi-layer-model": "Two convolutions and two linear layers over 6×6 colour images",
}
"""Name after ``demo:`` → what the model is, in one line."""

DEMO_DATASETS: dict[str, str] = {
    "digits": "100 labelled digits, ten a class; held out: all, the known 0–4, the new 5–9",
    "digits-shifted": "100 labelled digits, inverted and noisy; held out: shifted, and as before",
    "three-layers": "512 vectors of ten numbers that a fixed random plane divides into two classes",
    "simple-model": "512 other vectors of ten numbers, divided in the same way",
    "multi-layer-model": "512 random 6×6 colour images that a fixed random plane divides",
}
"""Name after ``demo:`` → what the data set is, in one line."""

DEMO_TRAINING: dict[str, dict[str, str]] = {
    "digits": {"epochs": "15", "batch_size": "16", "lr": "0.002"},
    "digits-shifted": {"epochs": "15", "batch_size": "16", "lr": "0.002"},
    "three-layers": {"epochs": "10"},
    "simple-model": {"epochs": "10"},
    "multi-layer-model": {"epochs": "10"},
}
"""Name after ``demo:`` → training options that show something, as a form holds them."""
