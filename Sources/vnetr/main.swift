print("vnetr")
