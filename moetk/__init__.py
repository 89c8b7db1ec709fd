"""moetk: mixture-of-experts parts that compose. Names are loaded when first touched."""
