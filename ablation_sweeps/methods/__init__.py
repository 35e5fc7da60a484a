"""Ablation methods, one file each: how the values that replace a neuron are computed."""
