# Every second block is dilated as far as its windows fit the maps of a 128 x 128 picture, which are 32, 16, 8 and 4 wide.
dinat = dict(type='DiNAT', dilations=[[1, 4], [1, 2], [1, 1, 1, 1], [1, 1]])
