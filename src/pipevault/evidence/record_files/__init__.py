"""The files that carry a record: pictures, videos, sound, arrays."""
