"""The same weights in growmoe and in a published implementation: equal outputs and gradients."""
