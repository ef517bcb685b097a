"""The traced graph of the losses, walked from them to the variables.

Lays open called functions, finds sizes that tracing does not know, and says where each variable
meets the examples. Imports ``cabs_tensorflow.rules``; computes nothing.
"""
