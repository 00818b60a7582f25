"""`pangu-sigma doctor`: what of this machine a training would use, tried out; the first thing to run beside an NPU."""
