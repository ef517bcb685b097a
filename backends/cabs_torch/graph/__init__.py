"""The autograd graph of a backward pass, walked from the losses to the parameters.

Says where each parameter meets the examples, by asking the rules, and what lies between a parameter
and its uses. Imports ``cabs_torch.rules``; computes nothing.
"""
