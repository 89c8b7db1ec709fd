"""Laws for users' own parts, and hypothesis strategies to draw their inputs."""
