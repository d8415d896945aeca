"""The demo: six example agents on a data set, over the network, and the same in one process."""
