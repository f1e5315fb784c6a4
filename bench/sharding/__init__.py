"""Ports of a model sharded over ranks of torch.distributed, right ones and with planted faults."""
