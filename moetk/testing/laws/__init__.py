"""The laws, one file a kind of part; each file ends in the tuple LAWS."""
