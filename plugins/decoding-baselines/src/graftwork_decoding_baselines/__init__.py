"""Baselines that decoding methods are compared with: CAD, AdaCAD, contrastive decoding, DoLa, interpolation, prior."""
