"""How each kind of linear map computes its statistics, from its input and from the cotangent of its output."""
