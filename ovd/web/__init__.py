"""The page: a picture and words in, detections out, in a browser (`ovd-web`, needs the extra `web`)."""
