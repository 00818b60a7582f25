"""How a model routes: saturation, co-activation, specialisation, load, entropy."""
