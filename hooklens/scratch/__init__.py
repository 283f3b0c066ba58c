"""What one writes once by hand to understand it: layers with their backward pass, toys, and a byte-pair tokenizer."""

from hooklens.scratch import bpe as bpe
from hooklens.scratch.bpe import BytePairs, train_byte_pairs
from hooklens.scratch.descent import Trainer, cross_entropy, squared_error
from hooklens.scratch.layers import GELU, Layer, Linear, ReLU, Sequential
from hooklens.scratch.neuron_views import NeuronViews, view_neurons
from hooklens.scratch.planar_data import quadrants, rings
from hooklens.scratch.regions import LinearRegions, Region, arrangement_regions, linear_regions
from hooklens.scratch.superposition import (
    Superposition,
    TiedAutoencoder,
    feature_dimensions,
    features_per_neuron,
    train_superposition,
)

__all__ = [
    "GELU",
    "BytePairs",
    "Layer",
    "Linear",
    "LinearRegions",
    "NeuronViews",
    "ReLU",
    "Region",
    "Sequential",
    "Superposition",
    "TiedAutoencoder",
    "Trainer",
    "arrangement_regions",
    "cross_entropy",
    "feature_dimensions",
    "features_per_neuron",
    "linear_regions",
    "quadrants",
    "rings",
    "squared_error",
    "train_byte_pairs",
    "train_superposition",
    "view_neurons",
]
